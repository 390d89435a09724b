"""Every configuration of the project: one dataclass a verb, one comment a field (it becomes the --help text).

YAML files hold differences from these defaults only; `vla.config_io.load_config` reads them and the flags.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


def number(default: Any, low: float, high: float | None = None, multiple: int = 1) -> Any:
    """A field whose value must lie in [low, high] and be a multiple of a number."""
    return field(default=default, metadata={"range": (low, high), "multiple": multiple})


@dataclass
class EnvConfig:
    name: str = "tabletop"  # environment: tabletop or metaworld
    tasks: tuple[str, ...] = ()  # task names; empty means all of the environment's
    image_size: int = number(96, 16)  # side of the square camera image, px


@dataclass
class CollectConfig:
    """Collect demonstrations, play or failures of the scripted expert into a LeRobotDataset v3 root."""

    output: str = "outputs/data/tabletop"  # LeRobotDataset root to write
    env: EnvConfig = field(default_factory=EnvConfig)
    kind: Literal["demonstrations", "play", "failures"] = (
        "demonstrations"  # play: some goals one after the other; failures: another object, or stopped; both without words
    )
    scenes: int = number(1000, 1, 100_000)  # scenes to collect (tabletop), or episodes for each task (metaworld)
    goals_per_scene: int = number(
        4, 1
    )  # valid goals attempted from the same initial state, different ones while there are; in play, one after the other in one episode
    noise: float = number(
        0.3, 0
    )  # std of the Gaussian noise on the executed action but its last dimension, the gripper (DART); labels stay the expert's
    noisy_share: float = number(0.5, 0, 1)  # share of the episodes collected with noise
    seed: int = number(0, 0, 400_000)  # seed of the first scene; scene i uses seed + i, far below those of evaluations
    workers: int = number(2, 1)  # processes


@dataclass
class DataConfig:
    root: str = "outputs/data/tabletop"  # LeRobotDataset root
    camera: str | None = None  # image key to train on; the only camera if not given
    image_size: int = number(96, 16)  # frames are stored at this side, px
    cache: str | None = None  # folder of the frame store; default: ROOT/.concord
    stream: bool = (
        False  # decode pictures whenever they are read, store none: where decoded ones do not fit on the disk
    )
    holdout: float = number(
        0.05, 0.0, 0.9
    )  # share of the episodes (whole scenes) held out for validation, at least one scene
    episodes_per_task: int | None = number(
        None, 1
    )  # use at most this many training episodes of each task (without meta/concord.json: goal)
    shift_px: int = number(4, 0)  # augmentation: random shift of up to this many px
    color_jitter: float = number(
        0.2, 0, 1
    )  # augmentation: brightness and contrast factors in 1 +- this, each colour channel's in 1 +- a quarter of it
    pasted_shapes: float = number(0.0, 0, 1)  # augmentation: share of pictures with random shapes pasted over them
    word_dropout: float = number(0.0, 0, 1)  # augmentation: share of the instructions' tokens that are hidden
    workers: int = number(
        2, 1
    )  # processes that build the frame store from stored images, or threads that decode a stream


@dataclass
class TowerConfig:
    pretrained: str | None = (
        None  # CLIPModel or VisionTextDualEncoderModel to start from: hub id or local folder; the sizes are its own
    )
    locked: bool = False  # stage one leaves the vision tower as it is and trains the rest (locked-image tuning)
    lora_rank: int = number(0, 0)  # stage one trains updates of this rank to a pretrained tower (LoRA); 0: its weights
    patch_size: int = number(12, 1)  # px
    width: int = number(128, 1)  # vision transformer width
    layers: int = number(4, 1)  # vision transformer layers
    heads: int = number(4, 1)  # vision transformer attention heads
    text_width: int = number(128, 1)  # text transformer width
    text_layers: int = number(3, 1)  # text transformer layers
    text_heads: int = number(4, 1)  # text transformer attention heads
    embed_dim: int = number(128, 1)  # joint embedding width
    vocab_size: int = number(
        1024, 514
    )  # byte-level BPE vocabulary, trained on the instructions; start and end of text come on top
    vocabulary: str | None = (
        None  # general vocabulary instead: open_clip's bpe_simple_vocab_16e6.txt.gz, or a tokenizer
    )
    lexicon: str | None = None  # sentence encoder whose meanings of words are the word embeddings: folder or hub id


@dataclass
class LossConfig:
    context_action: float = number(1.0, 0)  # weight: text-conditioned patch context <-> action chunk
    word_patch: float = number(0.3, 0)  # weight: words <-> patches, late interaction, multi-positive by goal
    vision_language: float = number(0.2, 0)  # weight: pooled image <-> instruction, multi-positive by goal
    vision_language_kind: Literal["softmax", "sigmoid"] = "softmax"  # InfoNCE, or a multi-label sigmoid loss
    state: float = number(0.0, 0)  # weight: pooled patch tokens <-> proprio state, soft targets by distance
    state_within_goal: bool = False  # state: compare pictures only with those that share a goal with them
    transition_action: float = number(
        0.0, 0
    )  # weight: change between two pictures of an episode <-> the actions between
    transition_language: float = number(0.0, 0)  # weight: that change <-> instruction, multi-positive by goal
    minimal_pairs: bool = (
        False  # word_patch: more negatives, texts with one word exchanged that name what the scene lacks
    )
    temperature: float = number(0.07, 0.01)  # initial temperature of every pair
    temperatures: tuple[str, ...] = ()  # other ones of single pairs: PAIR=VALUE, or PAIR=fixed:VALUE to keep it
    learn_temperature: bool = True  # learn the temperature, scale clamped to 100; False keeps it fixed
    action_beta: float = number(
        0.05, 1e-6
    )  # width of the soft targets over action chunks, mean squared normalised units
    state_beta: float = number(0.02, 1e-6)  # width of the soft targets over states, mean squared normalised units
    queries: int = number(6, 1)  # text-conditioned queries of the pooler
    pooler_width: int = number(128, 4, multiple=4)  # width of the pooler, a multiple of its 4 heads


@dataclass
class BatchConfig:
    goals: int = number(96, 2)  # P: different goals in a batch
    episodes: int = number(
        1, 1
    )  # K: episodes of each goal; more where there are fewer than P goals, so that the batch stays as large
    frames: int = number(2, 1)  # M: frames of each episode
    gap: int = number(3, 1)  # frames of one episode are at least this many timesteps apart
    same_scene: float = number(
        0.8, 0, 1
    )  # probability that a draw brings all goals of one scene instead of one episode's


@dataclass
class OptimizerConfig:
    lr: float = number(3e-3, 0)  # peak learning rate of Muon and AdamW, after warm-up, then cosine to 1 %
    pretrained_lr: float = number(1e-5, 0)  # learning rate of pretrained towers in stage one
    layer_decay: float = number(1.0, 0.01, 1)  # factor on stage one's learning rate for each layer below a tower's last
    weight_decay: float = number(0.05, 0)  # decoupled weight decay on matrices
    warmup: int = number(200, 0)  # steps of linear warm-up, at most a fifth of the run
    clip_norm: float = number(1.0, 1e-6)  # gradient norm is clipped to this


@dataclass
class AlignConfig:
    """Stage one: align the vision and language encoders on triplets; writes a run folder and clip/."""

    output: str = "outputs/align/tabletop"  # run folder
    data: DataConfig = field(default_factory=DataConfig)
    more: tuple[
        str, ...
    ] = ()  # further data sets, ROOT or ROOT=WEIGHT against data.root's 1; may lack words or actions
    tower: TowerConfig = field(default_factory=TowerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    wise_ft: tuple[float, ...] = ()  # shares of the way from a pretrained start at which it is exported, too (WiSE-FT)
    forgetting: str | None = (
        None  # data set of the pretrained start, whose held-out episodes are measured at the start, at the shares of wise_ft and at the end
    )
    horizon: int = number(16, 1)  # timesteps of an action chunk
    chunk: int = number(0, 0)  # images embedded at a time: less memory, the same gradients, more time; 0: all at once
    steps: int = number(6000, 1)  # optimiser updates
    seed: int = number(0, 0)  # of initialisation, sampling and augmentation, and of which episodes are held out
    precision: Literal["auto", "no", "bf16"] = (
        "auto"  # of the towers; auto: bf16 where the hardware has it; losses are float32
    )
    shuffle: Literal["none", "language", "action", "all"] = "none"  # control: permute this part of the triplets
    threads: int = number(2, 1)  # CPU threads
    log_every: int = number(20, 1)  # steps between log lines
    eval_every: int = number(1000, 0)  # steps between evaluations on held-out episodes; 0 means only at the end
    save_every: int = number(250, 1)  # steps between checkpoints
    snapshots: tuple[int, ...] = ()  # steps after which the encoder is exported, too, to snapshots/STEP/clip
    resume: bool = False  # continue the run in `output` from its last checkpoint


@dataclass
class HeadConfig:
    kind: Literal["l1", "flow"] = "l1"  # action head: chunk regression or flow matching
    horizon: int = number(16, 1)  # timesteps predicted
    n_action_steps: int = number(8, 1)  # timesteps executed before the next look
    queries: int = number(6, 1)  # text-conditioned queries over the patch tokens
    width: int = number(128, 4, multiple=4)  # width of the pooler, a multiple of its 4 heads
    hidden: int = number(384, 1)  # width of the residual MLP
    layers: int = number(2, 1)  # residual blocks
    state_dropout: float = number(0.1, 0, 1)  # probability of hiding the proprio state in training
    token_noise: float = number(0.0, 0)  # std of the noise on (normalised) cached tokens in training
    flow_steps: int = number(8, 1)  # Euler steps of the flow head


@dataclass
class PolicyTrainConfig:
    """Stage two: train the action head on the aligned encoder by behaviour cloning; writes a run folder and policy/."""

    output: str = "outputs/policy/tabletop"  # run folder
    encoder: str = "outputs/align/tabletop/clip"  # aligned encoder, a CLIPModel folder; or "random", untrained
    start: str | None = (
        None  # policy folder to go on from: its encoder, pooler, head and statistics; encoder is then ignored
    )
    data: DataConfig = field(default_factory=DataConfig)
    more: tuple[
        str, ...
    ] = ()  # further data sets to clone beside it, whole, ROOT or ROOT=WEIGHT; data.root has weight 1
    tower: TowerConfig = field(default_factory=TowerConfig)  # used only with encoder=random
    head: HeadConfig = field(default_factory=HeadConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    tune: bool = False  # fine-tune the encoder; False keeps it frozen and trains on cached tokens
    tuned_part: Literal["all", "vision", "last_block"] = "all"  # what of the encoder is fine-tuned
    encoder_lr_scale: float = number(0.1, 0)  # learning rate of the encoder relative to the head's, when tuned
    aligned_pooler: bool = False  # start the policy's pooler from the aligned one (an untrained encoder has none)
    pooler_lr_scale: float = number(
        1.0, 0
    )  # learning rate of an aligned pooler relative to the head's; 0 keeps it as it is
    auxiliary: float = number(0.0, 0)  # tuned: weight of stage one's terms beside the cloning loss, falling to 0
    loss: LossConfig = field(default_factory=LossConfig)  # those terms, used only with auxiliary > 0
    batch: BatchConfig = field(default_factory=BatchConfig)  # their triplets
    hide: Literal["none", "language", "vision"] = "none"  # control: the policy never gets this
    failures: bool = False  # clone failed episodes too
    cached_shifts: int = number(
        2, 0
    )  # frozen: copies of each frame in the token cache, the first plain, the others augmented; 0: no cache
    batch_size: int = number(256, 1)  # samples an update
    steps: int = number(20000, 1)  # optimiser updates
    ema: float = number(0.999, 0, 0.9999)  # decay of the averaged weights, which are the ones exported
    seed: int = number(0, 0)  # of initialisation, sampling and augmentation, and of which episodes are held out
    precision: Literal["auto", "no", "bf16"] = "auto"  # of the towers; auto: bf16 where the hardware has it
    threads: int = number(2, 1)  # CPU threads
    log_every: int = number(50, 1)  # steps between log lines
    eval_every: int = number(2000, 0)  # steps between validation losses; 0 means only at the end
    rollouts_every: int = number(0, 0)  # steps between closed-loop evaluations during training; 0 means never
    rollouts: int = number(20, 1)  # episodes of such an evaluation
    save_every: int = number(250, 1)  # steps between checkpoints
    resume: bool = False  # continue the run in `output` from its last checkpoint


@dataclass
class EvalConfig:
    """Evaluate a policy folder in closed loop; writes eval.json, report.html and videos."""

    policy: str = "outputs/policy/tabletop/policy"  # LeRobot policy folder
    output: str | None = None  # default: outputs/eval/ENV/NAME of the policy's run
    env: str | None = None  # environment: tabletop or metaworld; default: the one the policy was trained on
    tasks: tuple[str, ...] = ()  # task names; empty means the ones the policy was trained on, or all
    episodes: int = number(200, 1)  # in-distribution episodes, spread evenly over the tasks
    seed: int = number(1_000_000, 1_000_000)  # seed of the first episode; demonstrations have those below
    splits: tuple[str, ...] = ("all",)  # further splits to evaluate: names, "all" of the environment's, or "none"
    split_episodes: int = number(100, 0)  # episodes for each further split
    grounding_episodes: int = number(100, 0)  # episodes of each grounding measure; 0 switches it off
    end_on_success: bool = (
        False  # end episodes at the first success: faster, but success at the final timestep is unknown
    )
    device: str = "cpu"  # where the policy computes: cpu, cuda, cuda:1, ...; every process has a copy of it there
    batch_size: int = number(32, 1)  # environments stepped together in one process
    workers: int = number(2, 1)  # processes
    videos: int = number(6, 0)  # videos of successes and of failures of the plain episodes, each
    failures: int = number(60, 0)  # failed episodes of all splits and of swapped instructions, filmed for failures.html


def _compared_policy() -> PolicyTrainConfig:
    return PolicyTrainConfig(aligned_pooler=True)


@dataclass
class CompareConfig:
    """Compare arms on the same head, data, text features and episodes; writes comparison.json and report.html."""

    output: str = "outputs/compare/tabletop"  # folder of everything the comparison makes
    arms: tuple[str, ...] = (
        "scratch",
        "random-frozen",
        "cloning-pretrained-frozen",
        "aligned-frozen",
        "aligned-tuned",
        "shuffle-all",
    )  # arms to compare; docs/comparison.md lists all. NAME:NUMBER trains one on that number of demonstrations alone
    encoders: tuple[str, ...] = ()  # further frozen arms, NAME=FOLDER each of a CLIPModel or a vision transformer
    policies: tuple[str, ...] = ()  # LeRobot policy folders to evaluate beside the arms, NAME=FOLDER each
    demonstrations: tuple[int, ...] = (5, 25, 0)  # demonstrations of each task that the policies clone; 0 means all
    seeds: tuple[int, ...] = (0, 1, 2)  # training seeds
    transfer: tuple[str, ...] = ()  # tasks that encoders never see: they train on all others
    transfer_weight: float = number(
        1.0, 0
    )  # weight of those others beside 1 of the transfer tasks where policies clone; 0: these alone
    play_scenes: int = number(
        0, 0, 100_000
    )  # scenes of play, without words, that alignments see beside the demonstrations
    tuned_steps: int = number(1500, 1)  # steps of aligned-tuned, aligned-last-block and aligned-head-tuned
    tuned_lr_scale: float = number(0.1, 0)  # learning rate of aligned-head-tuned relative to policy.optimizer.lr
    scratch_steps: int = number(
        3000, 1
    )  # steps of scratch; choose as many as take as long as stage one and aligned-tuned
    cloning_steps: int = number(
        1500, 1
    )  # steps of the cloning that pretrains; choose as many as take as long as stage one
    collect: CollectConfig = field(default_factory=CollectConfig)  # the demonstrations
    align: AlignConfig = field(default_factory=AlignConfig)  # stage one
    policy: PolicyTrainConfig = field(default_factory=_compared_policy)  # stage two; its steps are the frozen arms'
    eval: EvalConfig = field(default_factory=EvalConfig)  # the evaluation
    dry_run: bool = False  # print what would run, how long it takes and what it can show, then stop


@dataclass
class SweepConfig:
    """All stages once for every value of a field of align or policy: --sweep.FIELD=a,b,c; several fields give every combination."""

    output: str = "outputs/sweep"  # folder of everything the sweep makes
    seeds: tuple[int, ...] = (0,)  # training seeds
    ablations: tuple[
        str, ...
    ] = ()  # instead of a sweep, the configuration as it is and once for each "FIELD=VALUE [FIELD=VALUE...]" changed
    collect: CollectConfig = field(default_factory=CollectConfig)  # the demonstrations, if align.data.root is absent
    align: AlignConfig = field(default_factory=AlignConfig)  # stage one
    policy: PolicyTrainConfig = field(default_factory=_compared_policy)  # stage two, on stage one's data
    eval: EvalConfig = field(default_factory=EvalConfig)  # the evaluation
    dry_run: bool = False  # print what would run and how long it takes, then stop


@dataclass
class DoctorConfig:
    """Check the machine and any data set, encoder or policy you name; one line a check, with its remedy."""

    data: str | None = None  # LeRobotDataset root
    camera: str | None = None  # its image key; the only camera if not given
    encoder: str | None = None  # aligned encoder (a CLIPModel folder)
    policy: str | None = None  # LeRobot policy folder


@dataclass
class BenchConfig:
    """Measure throughput and latency beside the peers, in one run; prints a table and writes bench.json."""

    output: str = "outputs/bench"  # folder of bench.json
    data: str | None = None  # LeRobotDataset root; default: a small tabletop data set, collected here
    batch_size: int = number(256, 1)  # triplets a batch
    horizon: int = number(16, 1)  # timesteps of an action chunk
    seconds: float = number(10.0, 0.01)  # of each measurement
    threads: int = number(1, 1)  # CPU threads
    alignment_steps: int = number(10, 1)  # steps of stage one and of its peer that are timed
    alignment_rows: tuple[int, ...] = (1024, 8192)  # rows of the two batches whose memory is compared
    policy: str | None = (
        None  # LeRobot policy folder for the tabletop, evaluated beside lerobot-eval; default: untrained
    )
    episodes: int = number(400, 1)  # of each of those evaluations
    expert_seeds: int = number(200, 1)  # scenes of each task that the tabletop's expert is tried on


@dataclass
class PipelineConfig:
    """The four stages one after the other, by configs/*/NAME.yaml. Run again, it goes on where it stopped."""

    name: str = "demo"  # name of the configurations
    fresh: bool = False  # first delete what an earlier run left, its data set too, and begin anew
    threads: int = number(2, 1)  # CPU threads and processes


@dataclass
class ResultsConfig:
    """Write the tables of the documentation from result files; copies their summaries to docs/results first."""

    runs: str = "outputs"  # folder with align/, eval/, compare/ and sweep/, whose results are taken up
    docs: str = "docs/results"  # folder of the summaries; the tables are written to FOLDER.md and comparison_results.md beside it
