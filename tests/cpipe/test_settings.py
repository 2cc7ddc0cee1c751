import pytest

from cpipe.pipeline import STAGES, TABLES
from cpipe.settings import asked_for, leaves, plan_settings, read_settings, resolve
from schemas.compose_model import ComposeConfig
from schemas.failures import UsageFailure
from schemas.generate_text import GenerateConfig
from schemas.tokenize_text import TokenizeConfig
from schemas.train_gates import GatesConfig
from schemas.train_seed import SeedConfig

CONFIGS = [*(stage.config for stage in STAGES), GenerateConfig]


def written(tmp_path, text):
    path = tmp_path / "cpipe.toml"
    path.write_text(text)
    return path


def refusal(call, *args):
    with pytest.raises(UsageFailure) as refused:
        call(*args)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("config_type", CONFIGS, ids=lambda config_type: config_type.__name__)
def test_nothing_given_is_the_stages_own_default(config_type):
    assert resolve(config_type, {}, {}, "here") == config_type()


@pytest.mark.parametrize("config_type", CONFIGS, ids=lambda config_type: config_type.__name__)
def test_leaves_have_names_of_their_own_and_sentences_of_help(config_type):
    names = [leaf.name for leaf in leaves(config_type)]
    assert len(set(names)) == len(names)
    for leaf in leaves(config_type):
        assert leaf.field.description.endswith("."), leaf.name


def test_a_stages_defaults_are_its_own_and_not_the_nested_models():
    assert resolve(SeedConfig, {}, {}, "here").training.steps == 1000
    gates = resolve(GatesConfig, {"batch_size": 3}, {}, "here")
    assert gates.training == GatesConfig().training.model_copy(update={"batch_size": 3})
    assert gates.training.steps == 100 and gates.training.weight_decay == 0
    assert {leaf.name: leaf.default for leaf in leaves(GatesConfig)}["steps"] == 100


def test_flags_go_over_the_table_and_the_table_over_defaults():
    config = resolve(SeedConfig, {"steps": 5, "hidden_size": 64}, {"steps": 7}, "here")
    assert (config.training.steps, config.model.hidden_size, config.training.batch_size) == (7, 64, 32)


def test_every_level_of_nesting_is_reached_by_its_leafs_name():
    config = resolve(ComposeConfig, {"bridge": "calm", "group_length": 4, "train": "bridges", "steps": 2}, {}, "here")
    assert (config.bridges.bridge, config.central.group_length) == ("calm", 4)
    assert (config.bridge_training.train, config.training.steps) == ("bridges", 2)


def test_lists_are_tuples_and_integers_are_taken_for_floats():
    config = resolve(TokenizeConfig, {"inputs": ["a", "b"]}, {}, "here")
    assert config.inputs == ("a", "b")
    assert resolve(SeedConfig, {"learning_rate": 1}, {}, "here").training.learning_rate == 1.0


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"stepz": 3}, "here: unknown setting `stepz`; did you mean `steps`?"),
        ({"batch-size": 3}, "here: unknown setting `batch-size`; did you mean `batch_size`?"),
        ({"xyzzy": 3}, "here: unknown setting `xyzzy`; expected one of hidden_size, "),
        ({"model": {"hidden_size": 3}}, "here: unknown setting `model`"),
        ({"steps": "3"}, "here: `training.steps`: "),
        ({"steps": True}, "here: `training.steps`: "),
        ({"steps": 0}, "here: `training.steps`: input should be greater than 0, found 0"),
        ({"learning_rate": float("nan")}, "here: "),
        ({"learning_rate": float("inf")}, "here: `training.learning_rate`: "),
        ({"engine": "jax"}, "here: `training.engine`: input should be 'auto', 'deepspeed' or 'torch', found 'jax'"),
        ({"num_attention_heads": 3}, "hidden_size 256 is not divisible by num_attention_heads 3"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_setting(table, message):
    assert message in refusal(resolve, SeedConfig, table, {}, "here")


def test_a_date_is_no_number_and_no_crash(tmp_path):
    tables = read_settings(tmp_path, written(tmp_path, "[train-seed]\nsteps = 2024-01-01"), TABLES)
    assert "`training.steps`" in refusal(resolve, SeedConfig, tables["train-seed"][0], {}, "here")


def test_without_a_file_there_are_no_settings(tmp_path):
    assert read_settings(tmp_path, None, TABLES) == {}
    assert refusal(read_settings, tmp_path, tmp_path / "none.toml", TABLES) == f"no settings file {tmp_path}/none.toml"


def test_tables_are_lists_and_another_file_replaces_the_runs_own(tmp_path):
    written(tmp_path, "[cluster]\nclusters = 3\n[[compose]]\nname = 'central'\n[[compose]]\nname = 'central-b'\n")
    assert read_settings(tmp_path, None, TABLES) == {
        "cluster": [{"clusters": 3}],
        "compose": [{"name": "central"}, {"name": "central-b"}],
    }
    other = tmp_path / "other.toml"
    other.write_text("[cluster]\nclusters = 5\n")
    assert read_settings(tmp_path, other, TABLES) == {"cluster": [{"clusters": 5}]}


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ("name = 'central-b'\nbridge_steps = 2\nbridge = 'calm'", None),
        ("bridge = 'calm'", "two compositions have the name central: give one of them another"),
        (
            "name = 'central-b'\nsteps = 2",
            "training.steps is 1000 for central and 2 for central-b, but a run trains the central model alone once, "
            "for all compositions: make them the same, or compose one in another run",
        ),
    ],
)
def test_compositions_of_a_run_have_names_of_their_own_and_one_central_model_alone(second, told, tmp_path):
    written(tmp_path, f"[[compose]]\n[[compose]]\n{second}\n")
    for asked in ((asked_for, tmp_path, None, ["compose"], []), (plan_settings, tmp_path, None, {})):
        if told:
            assert refusal(*asked) == f"{tmp_path}/cpipe.toml [[compose]]: {told}"
        else:
            asked[0](*asked[1:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train-sed]", "unknown table [train-sed]; did you mean `train-seed`?"),
        ("[train_seed]", "unknown table [train_seed]; did you mean `train-seed`?"),
        ("[xyzzy]", "unknown table [xyzzy]; expected one of collect, tokenize"),
        ("steps = 3", "unknown table [steps]"),
        ("cluster = 3", "[cluster] must be a table of settings"),
        ("compose = [1]", "[compose] must be a table of settings"),
        ("compose = []", "[compose] must be a table of settings"),
        ("[cluster\n", "is not valid TOML: "),
        ("[cluster]\nclusters = 3\nclusters = 4", "is not valid TOML: "),
    ],
)
def test_a_file_that_is_no_settings_is_refused_in_one_line(tmp_path, text, message):
    path = written(tmp_path, text)
    refused = refusal(read_settings, tmp_path, None, TABLES)
    assert str(path) in refused and message in refused


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "cpipe.toml").write_bytes(b"[cluster]\nx = '\xff\xfe'")
    assert "is not valid TOML" in refusal(read_settings, tmp_path, None, TABLES)
