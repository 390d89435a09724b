"""LeRobot imports the module named like this distribution."""
