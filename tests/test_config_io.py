"""The strict loader: default < YAML < flag, and every mistake is named."""

from itertools import pairwise

import pytest

from vla.config import (
    AlignConfig,
    BenchConfig,
    CollectConfig,
    CompareConfig,
    DoctorConfig,
    EvalConfig,
    PipelineConfig,
    PolicyTrainConfig,
    ResultsConfig,
    SweepConfig,
)
from vla.config_io import ConfigError, HelpRequested, load_config, save_yaml


def from_yaml(tmp_path, text: str, cls=AlignConfig, flags=()):
    path = tmp_path / "typo.yaml"
    path.write_text(text)
    return load_config(cls, ["--config_path", str(path), *flags])


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    config = from_yaml(tmp_path, "steps: 7\nhorizon: 8\n", flags=["--steps=9"])
    assert (config.steps, config.horizon, config.seed) == (9, 8, AlignConfig().seed)


def test_temperatures_of_pairs_are_read_alike_from_file_and_flag(tmp_path):
    wanted = ("state=0.1", "word_patch=fixed:0.07")
    file = from_yaml(tmp_path, "loss:\n  temperatures: [state=0.1, word_patch=fixed:0.07]\n")
    flag = load_config(AlignConfig, ["--loss.temperatures=[state=0.1,word_patch=fixed:0.07]"])
    assert file.loss.temperatures == flag.loss.temperatures == wanted


def test_an_unknown_key_names_the_file_and_the_closest_field(tmp_path):
    with pytest.raises(
        ConfigError, match=r"config error: .*/typo.yaml: stepz is not a field of AlignConfig; did you mean steps\?"
    ):
        from_yaml(tmp_path, "stepz: 7\n")


def test_an_unknown_nested_key_is_named_with_its_path(tmp_path):
    with pytest.raises(ConfigError, match=r"loss\.temprature is not a field of LossConfig; did you mean temperature"):
        from_yaml(tmp_path, "loss:\n  temprature: 0.1\n")


@pytest.mark.parametrize("flag", ["--steps=true", "--steps=1.5", "--steps=many"])
def test_a_value_of_another_type_is_refused(flag):
    with pytest.raises(ConfigError, match="steps must be an int, got"):
        load_config(AlignConfig, [flag])


def test_true_is_not_an_int_in_yaml_either(tmp_path):
    with pytest.raises(ConfigError, match=r"typo\.yaml: steps must be an int, got True"):
        from_yaml(tmp_path, "steps: true\n")


def test_a_repeated_key_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="steps is given twice"):
        from_yaml(tmp_path, "steps: 1\nsteps: 2\n")
    with pytest.raises(ConfigError, match="line 3: root is given twice"):
        from_yaml(tmp_path, "data:\n  root: a\n  root: b\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("? [steps]\n: 1\n", "unhashable key"),
        ("steps: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("steps: &loop [*loop]\n", "steps must be"),
    ],
)
def test_yaml_that_holds_more_than_plain_values_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        from_yaml(tmp_path, text)


def test_a_choice_lists_what_it_can_be():
    with pytest.raises(ConfigError, match="precision must be one of auto, no, bf16, got 'fp8'"):
        load_config(AlignConfig, ["--precision=fp8"])


def test_a_number_out_of_range_is_refused():
    with pytest.raises(ConfigError, match=r"loss\.temperature must be at least"):
        load_config(AlignConfig, ["--loss.temperature=0"])


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"loss\.pooler_width must be a multiple of 4, got 130"):
        load_config(AlignConfig, ["--loss.pooler_width=130"])


def test_infinity_is_refused():
    with pytest.raises(ConfigError, match="must be finite"):
        load_config(AlignConfig, ["--loss.temperature=inf"])


def test_lists_come_from_flags_separated_by_commas():
    assert load_config(EvalConfig, ["--splits=light,camera"]).splits == ("light", "camera")


@pytest.mark.parametrize(
    ("text", "roots"), [("[a,b]", ("a", "b")), ("(a, b)", ("a", "b")), ("data(2)", ("data(2)",)), ("a,b]", ("a", "b]"))]
)
def test_brackets_belong_to_a_list_only_around_all_of_it(text, roots):
    assert load_config(AlignConfig, [f"--more={text}"]).more == roots


def test_a_flag_without_value_is_refused():
    with pytest.raises(ConfigError, match="--steps needs a value"):
        load_config(AlignConfig, ["--steps", "--seed=1"])


def test_a_section_cannot_be_set_as_a_whole():
    with pytest.raises(ConfigError, match="loss holds fields"):
        load_config(AlignConfig, ["--loss=1"])


def test_the_resolved_configuration_reads_back_equal(tmp_path):
    config = load_config(CollectConfig, ["--env.tasks=push,place", "--noise=0.5"])
    save_yaml(config, tmp_path / "config.yaml")
    assert load_config(CollectConfig, ["--config_path", str(tmp_path / "config.yaml")]) == config


def test_help_tells_every_field_with_comment_and_default():
    with pytest.raises(HelpRequested) as help_text:
        load_config(AlignConfig, ["--help"])
    text = str(help_text.value)
    assert "--loss.temperature=0.07" in text
    assert "initial temperature of every pair" in text
    assert text.count("\n  --") == 2 + count_fields(AlignConfig())


@pytest.mark.parametrize(
    "cls",
    [
        CollectConfig,
        AlignConfig,
        PolicyTrainConfig,
        EvalConfig,
        CompareConfig,
        SweepConfig,
        DoctorConfig,
        BenchConfig,
        PipelineConfig,
        ResultsConfig,
    ],
)
def test_no_field_goes_without_a_comment(cls):
    with pytest.raises(HelpRequested) as help_text:
        load_config(cls, ["--help"])
    lines = str(help_text.value).splitlines()
    assert [flag for flag, comment in pairwise(lines) if flag.startswith("  --") and not comment.strip()] == []


def count_fields(config) -> int:
    return sum(count_fields(v) if hasattr(v, "__dataclass_fields__") else 1 for v in vars(config).values())
