"""A LeRobot policy folder as something that rollouts can drive."""

from pathlib import Path

import numpy as np
import torch
from draccus.utils import DecodingError
from einops import rearrange
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.processor.pipeline import ProcessorMigrationError
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME
from safetensors import SafetensorError

import vla.policies.concord  # noqa: F401 - registers the policy type
from vla.files import read_json
from vla.types import STATE_KEY, TASK_KEY, UserError, first_line

# What transformers, LeRobot and safetensors raise for a folder that is damaged, or that another program or version wrote.
LOAD_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    ImportError,
    SafetensorError,
    DecodingError,
    ProcessorMigrationError,  # no processor in the folder
)

# Of LeRobot 0.6, what trusts the code of a repository that its configuration names. Steps that it does not register run any class.
FOREIGN_TYPES = ("gaussian_actor", "groot", "pi0_fast", "wall_x")
FOREIGN_STEPS = ("action_tokenizer_processor", "groot_n1_7_vlm_encode_v1")


class LeRobotChunkPolicy:
    """Drives a LeRobot policy through `predict_action_chunk`, with its own pre- and post-processing."""

    def __init__(self, policy, preprocess, postprocess, camera: str) -> None:
        self.policy, self.preprocess, self.postprocess, self.camera = policy, preprocess, postprocess, camera
        self.n_action_steps = int(getattr(policy.config, "n_action_steps", 1))

    @torch.no_grad()
    def act(self, images: np.ndarray, state: np.ndarray, instructions: list[str]) -> np.ndarray:
        """(b, H, W, 3) uint8, (b, s) environment units, b texts -> (b, n_action_steps, a) environment units."""
        chunk = self.policy.predict_action_chunk(self._batch(images, state, instructions))[:, : self.n_action_steps]
        return self.postprocess(chunk).float().cpu().numpy()

    def attention(self, images: np.ndarray, state: np.ndarray, instructions: list[str]) -> np.ndarray | None:
        """(b, side, side): where the policy looks; None for policies that do not tell."""
        if not hasattr(self.policy, "attention"):
            return None
        return self.policy.attention(self._batch(images, state, instructions)).cpu().numpy()

    def _batch(self, images: np.ndarray, state: np.ndarray, instructions: list[str]) -> dict:
        return self.preprocess(
            {
                self.camera: rearrange(torch.from_numpy(images), "b h w c -> b c h w").float() / 255.0,
                STATE_KEY: torch.from_numpy(state).float(),
                TASK_KEY: list(instructions),
            }
        )


def load_chunk_policy(folder: Path | str, device: str = "cpu") -> LeRobotChunkPolicy:
    """Load a policy folder that `save_pretrained` wrote, with its processors, onto a device such as "cpu" or "cuda".

    Raises:
        UserError: no such folder or device, files missing or damaged, or a policy that reads several cameras or past observations.
    """
    folder = Path(folder)
    if (folder / "policy" / "config.json").is_file():
        raise UserError(f"{folder}: not a policy folder; did you mean {folder / 'policy'}?")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a policy folder (no config.json); run `python scripts/train_policy.py`")
    check_device("device", device)
    try:
        config = PreTrainedConfig.from_pretrained(folder)
        refuse_memory(folder, config)
        config.device = device
        if hasattr(config, "pretrained_backbone_weights"):
            config.pretrained_backbone_weights = None  # a download that the folder's own weights would overwrite
        preprocess, postprocess = load_processors(folder, config, device)  # first: it refuses foreign code
        policy = get_policy_class(config.type).from_pretrained(folder, config=config, strict=True)
    except LOAD_ERRORS as error:
        raise UserError(f"{folder}: cannot load the policy: {first_line(error)}") from error
    if STATE_KEY in (getattr(policy, "_queues", None) or {}):
        raise UserError(
            f"{folder}: a {config.type} policy queues observations; only those that read one at a time can be evaluated"
        )
    cameras = list(config.image_features)
    if len(cameras) != 1:
        raise UserError(f"{folder}: the policy reads cameras {cameras}; the environments have one")
    policy.eval()
    return LeRobotChunkPolicy(policy, preprocess, postprocess, cameras[0])


def check_device(field: str, device: str) -> None:
    """Refuse a device that this machine has not.

    Raises:
        UserError: names the field and the device.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"{field} {device!r} cannot be used: {first_line(error)}") from error


def load_processors(folder: Path, config: PreTrainedConfig, device: str):
    """The pre- and postprocessor in a policy folder.

    Raises:
        UserError: they, or the policy itself, would run code from elsewhere. Also what LeRobot raises for damaged files.
    """
    refuse_foreign_code(folder, config)
    here = {"device_processor": {"device": device}}
    return make_pre_post_processors(config, pretrained_path=str(folder), preprocessor_overrides=here)


def refuse_foreign_code(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse what LeRobot would import or download and run because a file of the folder says so.

    Raises:
        UserError: names the policy type or the processor step.
    """
    if config.type in FOREIGN_TYPES:
        raise UserError(
            f"{folder}: a {config.type} policy runs code of the repositories that it names; it is not loaded"
        )
    for name in (POLICY_PREPROCESSOR_DEFAULT_NAME, POLICY_POSTPROCESSOR_DEFAULT_NAME):
        path = folder / f"{name}.json"
        steps = read_json(path).get("steps")
        for step in steps if isinstance(steps, list) else ():  # what is malformed LeRobot refuses
            if isinstance(step, dict) and ("registry_name" not in step or step["registry_name"] in FOREIGN_STEPS):
                what = step.get("registry_name", step.get("class"))
                raise UserError(f"{path}: the step {what!r} runs code from elsewhere; it is not loaded")


def refuse_memory(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse policies whose next chunk depends on the steps before: rollouts show the present observation alone.

    Raises:
        UserError: names the field.
    """
    observed, ensembled = config.n_obs_steps, getattr(config, "temporal_ensemble_coeff", None)
    if observed > 1:
        raise UserError(
            f"{folder}: a {config.type} policy with n_obs_steps {observed}; only those of 1 can be evaluated"
        )
    if ensembled is not None:
        raise UserError(f"{folder}: temporal_ensemble_coeff is {ensembled}; only policies without can be evaluated")
