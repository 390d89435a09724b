"""The `concord` policy for LeRobot."""

from vla.policies.concord.configuration_concord import ConcordConfig
from vla.policies.concord.modeling_concord import ConcordPolicy
from vla.policies.concord.processor_concord import make_concord_pre_post_processors

__all__ = ["ConcordConfig", "ConcordPolicy", "make_concord_pre_post_processors"]
