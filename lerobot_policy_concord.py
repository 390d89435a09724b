"""What LeRobot imports when it looks for plugins: registers the policy type and the environments."""

import vla.integrations.lerobot_env
import vla.policies.concord  # noqa: F401
