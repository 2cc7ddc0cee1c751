import fcntl
import json
import subprocess
import sys

import pytest
from typer.main import get_command

from cpipe.app import build_app
from cpipe.pipeline import BY_COMMAND, STAGES, Stage
from cpipe.settings import leaves
from schemas import failures
from schemas.generate_text import GenerateConfig

HEAVY = ("torch", "deepspeed", "pyarrow", "polars", "tokenizers", "sklearn", "numpy", "safetensors", "matplotlib")
COMMANDS = [
    "collect", "tokenize", "cluster", "train-seed", "train-experts", "train-gates", "compose", "evaluate", "import",
    "export", "generate", "route", "run", "slurm", "status", "demo", "init", "plan", "verify", "clean", "schema",
    "report",
]  # fmt: skip
SHARED = {"settings", "force", "as_json"}


def python(code, *args):
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120)


def main(*words, before="", after=""):
    """`cpipe` with these words in a process of its own."""
    code = f"import sys; sys.argv = ['cpipe', *{[str(word) for word in words]!r}]\n{before}\n"
    code += f"from cpipe.__main__ import main\ntry:\n    main()\nfinally:\n    {after or 'pass'}"
    return python(code)


@pytest.mark.parametrize("words", [["--help"], ["train-seed", "--help"], ["status", "."], ["train-seed", ".", "--x"]])
def test_help_status_and_mistakes_load_nothing_heavy(words, tmp_path):
    if "." in words:
        words = [str(tmp_path) if word == "." else word for word in words]
    result = main(*words, after=f"print('LOADED', *(name for name in {HEAVY!r} if name in sys.modules))")
    assert result.returncode == (2 if "--x" in words else 0)
    assert result.stdout.splitlines()[-1] == "LOADED"
    if words == ["--help"]:
        for command in COMMANDS:
            assert f" {command} " in result.stdout
    if words == ["train-seed", "--help"]:
        for leaf in leaves(BY_COMMAND["train-seed"].config):
            assert f"  --{leaf.name.replace('_', '-')} " in result.stdout  # whole, also where lines are short
        assert "Width of the residual stream. Default: 256." in result.stdout


def flags_of(command):
    return {name for option in command.params for name in (*option.opts, *option.secondary_opts)}


def test_the_commands_are_these():
    assert list(get_command(build_app()).commands) == COMMANDS


@pytest.mark.parametrize("name", [*BY_COMMAND, "generate"])
def test_the_flags_of_a_stage_are_the_settings_of_its_config(name):
    command = get_command(build_app()).commands[name]
    config = GenerateConfig if name == "generate" else BY_COMMAND[name].config
    expected = {"run", "--settings", "--json"} | (set() if name == "generate" else {"--force"})
    for leaf in leaves(config):
        extra = leaf.field.json_schema_extra
        if isinstance(extra, dict) and extra.get("argument"):
            expected.add(leaf.name)
            continue
        flag = leaf.name.replace("_", "-")
        expected.add(f"--{flag}")
        if leaf.field.annotation is bool:
            expected.add(f"--no-{flag}")
    assert flags_of(command) == expected


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("run", {"run", "inputs", "--from", "--until", "--settings", "--force", "--dry-run", "--json"}),
        ("slurm", {"run", "inputs", "--until", "--submit", "--settings", "--force", "--json"}),
        ("status", {"run", "--json", "--watch"}),
        ("demo", {"run", "--force"}),
        ("init", {"run"}),
        ("schema", {"stage", "--manifest"}),
        ("report", {"run", "--prompt"}),
        ("clean", {"run", "--unfinished", "--dry-run", "--json"}),
        ("verify", {"run", "--sizes-only", "--json"}),
    ],
)
def test_the_flags_of_the_other_commands_are_these(name, flags):
    assert {flag.removeprefix("--no-as") for flag in flags_of(get_command(build_app()).commands[name])} == flags


@pytest.mark.parametrize("name", ["train-seed", "compose", "generate"])
def test_asked_for_alone_a_command_is_the_same(name):
    alone, among = (get_command(build_app(asked)).commands[name] for asked in (name, None))
    assert [(option.name, option.opts) for option in alone.params] == [(o.name, o.opts) for o in among.params]
    assert alone.help == among.help


def test_nothing_asked_shows_the_help(cpipe):
    result = cpipe()
    assert result.exit_code == 2
    assert all(f"  {command} " in result.output for command in COMMANDS)


def test_flags_go_over_the_file_and_the_file_over_defaults(cpipe, configs, tmp_path):
    (tmp_path / "cpipe.toml").write_text("[train-seed]\nsteps = 5\nhidden_size = 64\n")
    assert cpipe("train-seed", tmp_path, "--steps", "7", "--force").exit_code == 0
    ((command, config, force),) = configs
    assert (command, force) == ("train-seed", True)
    assert (config.training.steps, config.model.hidden_size, config.training.batch_size) == (7, 64, 32)


def test_another_file_is_read_instead(cpipe, configs, tmp_path):
    (tmp_path / "cpipe.toml").write_text("[cluster]\nclusters = 5\n")
    other = tmp_path / "other.toml"
    other.write_text("[cluster]\nrestarts = 9\n")
    cpipe("cluster", tmp_path, "--settings", other)
    ((_, config, _),) = configs
    assert (config.restarts, config.clusters) == (9, 8)


def test_flags_that_are_false_zero_or_repeated_arrive(cpipe, configs, tmp_path):
    cpipe("train-experts", tmp_path, "--no-dense", "--final-learning-rate", "0")
    cpipe("evaluate", tmp_path, "--top-k", "3", "--top-k", "5")
    cpipe("train-gates", tmp_path, "--modes", "joint")
    cpipe("tokenize", tmp_path, "a.txt", "b.txt")
    experts, evaluate, gates, tokenize = (config for _, config, _ in configs)
    assert (experts.dense, experts.training.final_learning_rate) == (False, 0.0)
    assert evaluate.top_k == (3, 5)
    assert gates.modes == ("joint",) and gates.training.steps == 100
    assert tokenize.inputs == ("a.txt", "b.txt")


def test_a_table_of_several_is_a_stage_run_several_times(cpipe, configs, tmp_path, line):
    (tmp_path / "cpipe.toml").write_text("[[compose]]\nsteps = 1\n[[compose]]\nname = 'central-b'\nsteps = 2\n")
    assert cpipe("compose", tmp_path).exit_code == 0
    assert [(config.name, config.training.steps) for _, config, _ in configs] == [("central", 1), ("central-b", 2)]
    result = cpipe("compose", tmp_path, "--steps", "3")
    assert result.exit_code == 2 and "2 tables [[compose]]" in line(result)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train-seed", "--engine", "jax"], "--engine"),
        (["train-seed", "--steps", "x"], "--steps"),
        (["train-seed", "--stepz", "3"], "--stepz"),
        (["train-seeds"], "train-seeds"),
        (["evaluate", "--top-k", "x"], "--top-k"),
    ],
)
def test_a_word_the_command_line_does_not_know_is_usage(cpipe, tmp_path, words, told):
    result = cpipe(words[0], tmp_path, *words[1:])
    assert result.exit_code == 2
    assert told in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train-seed", "--steps", "0"], "`training.steps`: input should be greater than 0, found 0"),
        (
            ["train-gates", "--modes", "both"],
            "`modes.0`: input should be 'independent', 'joint', 'contrastive', 'mean-activation' or 'arrow', "
            "found 'both'",
        ),
        (["train-seed", "--num-attention-heads", "3"], "hidden_size 256 is not divisible by num_attention_heads 3"),
        (["compose", "--name", "tokens"], "`central-<word>`"),
        (["cluster", "--settings", "none.toml"], "no settings file none.toml"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(cpipe, tmp_path, line, words, told):
    result = cpipe(words[0], tmp_path, *words[1:])
    assert result.exit_code == 2 and result.stdout == ""
    assert told in line(result)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[train-seed]\nstepz = 3", "cpipe.toml [train-seed]: unknown setting `stepz`; did you mean `steps`?"),
        ("[train-sed]\nsteps = 3", "unknown table [train-sed]; did you mean `train-seed`?"),
        ("[train-seed", "is not valid TOML"),
    ],
)
@pytest.mark.parametrize("command", ["train-seed", "run"])
def test_a_settings_file_that_is_wrong_is_one_line(cpipe, tmp_path, line, configs, command, text, told):
    (tmp_path / "cpipe.toml").write_text(text)
    result = cpipe(command, tmp_path)
    assert result.exit_code == 2
    assert told in line(result)


@pytest.mark.parametrize("kind", failures.Failure.__subclasses__(), ids=lambda kind: kind.__name__)
def test_a_stage_that_fails_is_one_line_and_its_exit_code(cpipe, tmp_path, line, monkeypatch, kind):
    def fail(*args, **named):
        raise kind("found this, expected that: run `cpipe x`")

    monkeypatch.setattr(Stage, "run", fail)
    result = cpipe("train-seed", tmp_path, "--json")
    assert result.exit_code == kind.exit_code
    assert line(result) == "found this, expected that: run `cpipe x`"
    assert result.stdout == ""


def test_a_failure_has_no_traceback_and_a_bug_has_one(tmp_path):
    fails = "from cpipe.pipeline import Stage\nfrom schemas.failures import InputFailure\ndef run(*a, **k):\n    raise "
    failed = main("cluster", tmp_path, before=f"{fails} InputFailure('bad text')\nStage.run = run")
    assert (failed.returncode, failed.stderr, failed.stdout) == (3, "cpipe: bad text\n", "")
    bug = main("cluster", tmp_path, before=f"{fails} ZeroDivisionError('a bug')\nStage.run = run")
    assert bug.returncode == 1
    assert "Traceback" in bug.stderr and "ZeroDivisionError" in bug.stderr and "a bug" in bug.stderr


@pytest.mark.parametrize(
    ("command", "first"),
    [
        ("tokenize", "no text given: name files, folders or globs after the run"),
        ("cluster", "run `cpipe tokenize"),
        ("train-seed", "run `cpipe tokenize"),
        ("train-experts", "run `cpipe tokenize"),
        ("train-gates", "run `cpipe tokenize"),
        ("compose", "run `cpipe tokenize"),
        ("evaluate", "run `cpipe tokenize"),
        ("generate", "run `cpipe tokenize"),
    ],
)
def test_before_its_inputs_exist_a_stage_says_what_to_run(cpipe, tmp_path, line, command, first):
    result = cpipe(command, tmp_path)
    assert result.exit_code == 2
    assert first in line(result)


@pytest.mark.parametrize(
    ("folder", "command", "first"),
    [
        ("clusters", "train-experts", "cluster"),
        ("clusters", "train-gates", "cluster"),
        ("clusters", "evaluate", "cluster"),
        ("seed", "train-experts", "train-seed"),
        ("seed", "compose", "train-seed"),
        ("experts", "train-gates", "train-experts"),
        ("experts", "compose", "train-experts"),
        ("experts", "evaluate", "train-experts"),
        ("experts", "generate", "train-experts"),
        ("gates", "compose", "train-gates"),
    ],
)
def test_the_command_to_run_first_is_that_of_what_is_missing(
    cpipe, piped_run, copied_run, line, folder, command, first
):
    run_dir = copied_run(piped_run)
    (run_dir / folder / "manifest.json").unlink()
    result = cpipe(command, run_dir)
    assert result.exit_code == 2
    assert f"no {folder} in {run_dir}: run `cpipe {first} {run_dir}` first" in line(result)


def test_a_stage_that_another_process_works_on_is_left_alone(cpipe, piped_run, copied_run, line):
    run_dir = copied_run(piped_run)
    with (run_dir / ".locks/clusters.lock").open("w") as lock:
        lock.write("process 1 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = cpipe("cluster", run_dir)
        assert result.exit_code == 5
        assert "is being worked on by process 1 on elsewhere" in line(result)
    assert cpipe("cluster", run_dir).exit_code == 0


def changed(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: path.write_text("{"), "not valid JSON"),
        (lambda path: path.write_bytes(b"\xff\x00"), "not valid JSON"),
        (lambda path: changed(path, schema="cpipe.tokenize/99"), "upgrade cpipe"),
        (lambda path: changed(path, schema="cpipe.cluster/1"), "expected 'cpipe.tokenize/1'"),
        (lambda path: changed(path, extra=1), "unknown key `extra`"),
    ],
)
@pytest.mark.parametrize("command", ["status", "cluster", "generate"])
def test_a_manifest_that_is_none_is_refused(cpipe, piped_run, copied_run, line, spoil, told, command):
    run_dir = copied_run(piped_run)
    spoil(run_dir / "tokens/manifest.json")
    result = cpipe(command, run_dir)
    assert result.exit_code == 4
    assert told in line(result) and "tokens/manifest.json" in line(result)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("tokens/train-00000.arrow", ["cluster", "--force"]),
        ("tokens/train-00000.arrow", ["train-seed", "--force"]),
        ("tokens/valid-00000.arrow", ["evaluate", "--force"]),
        ("tokens/tokenizer.json", ["generate"]),
        ("clusters/centroids.safetensors", ["evaluate", "--force"]),
        ("clusters/assignments-train.arrow", ["train-experts", "--force"]),
        ("seed/model.safetensors", ["train-experts", "--force"]),
        ("experts/001/model.safetensors", ["train-gates", "--force"]),
        ("experts/001/model.safetensors", ["generate", "--model", "expert:1"]),
        ("gates/gates.safetensors", ["evaluate", "--force"]),
        ("central/model.safetensors", ["generate", "--model", "central"]),
    ],
)
def test_a_flipped_bit_is_found_before_it_is_read(cpipe, piped_run, copied_run, line, file, words):
    run_dir = copied_run(piped_run)
    content = bytearray((run_dir / file).read_bytes())
    content[len(content) // 2] ^= 4
    (run_dir / file).write_bytes(content)
    result = cpipe(words[0], run_dir, *words[1:])
    assert result.exit_code == 4
    assert f"{run_dir / file} was changed after it was written" in line(result)


@pytest.mark.parametrize("command", ["tokenize", "cluster", "train-seed", "train-gates", "evaluate"])
def test_json_is_exactly_the_manifest(cpipe, piped_run, tiny_corpus, command):
    result = cpipe(command, piped_run, *([tiny_corpus] if command == "tokenize" else []), "--json")
    assert result.exit_code == 0, result.stderr
    folder = BY_COMMAND[command].manifest.folder
    assert json.loads(result.stdout) == json.loads((piped_run / folder / "manifest.json").read_text())


def test_a_changed_setting_is_named_and_nothing_is_touched(cpipe, piped_run, line):
    before = (piped_run / "clusters/manifest.json").read_bytes()
    result = cpipe("cluster", piped_run, "--clusters", "2")
    assert result.exit_code == 2
    assert "clusters was 3 and is now 2: give --force" in line(result)
    assert (piped_run / "clusters/manifest.json").read_bytes() == before


def test_run_with_force_repeats_only_what_is_not_as_asked_for(cpipe, piped_run, copied_run, line):
    run_dir = copied_run(piped_run)
    settings = run_dir / "cpipe.toml"
    settings.write_text(settings.read_text().replace("tokens = 700", "tokens = 650"))
    manifests = {path: path.read_bytes() for path in run_dir.rglob("manifest.json")}
    result = cpipe("run", run_dir)
    assert result.exit_code == 2 and "tokens was 700 and is now 650: give --force" in line(result)
    assert {path: path.read_bytes() for path in manifests} == manifests
    assert cpipe("run", run_dir, "--force").exit_code == 0
    assert [path for path in manifests if path.read_bytes() != manifests[path]] == [run_dir / "reports/manifest.json"]


@pytest.mark.parametrize("model", ["seed", "cbtm", "central", "central-calm"])
def test_generate_prints_the_continuation_and_nothing_else(cpipe, piped_run, model):
    words = ["generate", piped_run, "--model", model, "--prompt", "the [bold]x", "--max-tokens", "6"]
    plain, again, as_json = cpipe(*words), cpipe(*words), cpipe(*words, "--json")
    assert plain.exit_code == as_json.exit_code == 0, plain.stderr
    text = json.loads(as_json.stdout)
    assert text["prompt"] == "the [bold]x"
    assert plain.stdout == again.stdout == text["text"] + "\n"
    assert cpipe(*words, "--random-seed", "5", "--temperature", "2").stdout != plain.stdout


def test_generate_reads_its_table_and_stops_where_told(cpipe, piped_run, copied_run):
    run_dir = copied_run(piped_run)
    words = ["generate", run_dir, "--max-tokens", "40", "--model", "seed", "--sample-top-p", "1", "--temperature", "3"]
    text = cpipe(*words).stdout.removesuffix("\n")
    stop = text[7:10]
    assert stop
    assert cpipe(*words, "--stop", stop, "--stop", "never this").stdout == text[: text.index(stop)] + "\n"
    with (run_dir / "cpipe.toml").open("a") as file:
        file.write(f"\n[generate]\nstop = [{json.dumps(stop)}]\n")
    assert cpipe(*words).stdout == text[: text.index(stop)] + "\n"


def test_two_tables_for_one_text_are_refused(cpipe, tmp_path, line):
    (tmp_path / "cpipe.toml").write_text("[[generate]]\nprompt = 'a'\n[[generate]]\nprompt = 'b'\n")
    result = cpipe("generate", tmp_path)
    assert result.exit_code == 2 and "2 tables [[generate]]" in line(result)


def test_generate_names_the_models_there_are(cpipe, piped_run, line):
    result = cpipe("generate", piped_run, "--model", "sed")
    assert result.exit_code == 2
    assert "seed, dense, expert:0 to expert:2, cbtm, central, central-calm" in line(result)


def test_every_stage_has_one_name_in_three_places():
    from pathlib import Path

    root = Path(__file__).parents[2]
    for stage in STAGES:
        for path in (f"stages/{stage.module}.py", f"schemas/{stage.module}.py", f"tests/stages/test_{stage.module}.py"):
            assert (root / path).is_file(), path
        assert stage.manifest.command == stage.command
