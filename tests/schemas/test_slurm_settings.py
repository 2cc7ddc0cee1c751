import tomllib

import pytest

from schemas.failures import UsageFailure
from schemas.strict import Config, validated
from schemas.submit_jobs import JobsRecord, SlurmConfig


def parsed(text):
    return validated(SlurmConfig, tomllib.loads(text), "cpipe.toml [slurm]")


def test_a_stages_table_stands_over_the_defaults_key_by_key():
    slurm = parsed(
        """
        partition = "cpu"
        time = "30"
        setup = ["module load a"]
        [train-seed]
        partition = "gpu"
        gpus = 4
        nodes = 2
        """
    )
    seed, cluster = slurm.resolved(slurm.train_seed), slurm.resolved(slurm.cluster)
    assert (seed.partition, seed.time, seed.gpus, seed.nodes, seed.setup) == ("gpu", "30", 4, 2, ("module load a",))
    assert (cluster.partition, cluster.time, cluster.gpus, cluster.nodes) == ("cpu", "30", None, None)


def test_dense_asks_for_what_an_expert_does_unless_told_otherwise():
    slurm = parsed("[train-experts]\ngpus = 1\ntime = '60'\nat_once = 2\n[train-dense]\ngpus = 8")
    dense = slurm.resolved(slurm.train_experts, slurm.train_dense)
    assert (dense.gpus, dense.time) == (8, "60")


@pytest.mark.parametrize(
    "text",
    [
        'partition = "gpu"', 'partition = "a,b-c_d.e"', 'time = "30"', 'time = "1:30"', 'time = "12:00:00"',
        'time = "2-00"', 'time = "2-00:30:00"', 'memory = "64G"', 'memory = "1024"', 'setup = ["a\tb"]',
        'header = ["--mail-type=END"]', "header = []", "[train-seed]\nprocesses = 2", "[tokenize]\nat_once = 1",
    ],
)  # fmt: skip
def test_what_slurm_knows_is_taken(text):
    parsed(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('partition = "a b"', "`partition`"),
        ('partition = "--wrap=x"', "`partition`"),
        ('partition = "a\\n#SBATCH --wrap=x"', "`partition`"),
        ('partition = "a\\n"', "`partition`"),
        ('account = "$(id)"', "`account`"),
        ('qos = ""', "`qos`"),
        ('time = "soon"', "`time`"),
        ('time = "30\\n"', "`time`"),
        ("time = 30", "`time`: input should be a valid string, found 30"),
        ('memory = "lots"', "`memory`"),
        ("gpus = -1", "`gpus`"),
        ('header = ["mail-type=END"]', "must be an option of sbatch, as in --mail-type=END"),
        ('header = ["--a\\n--b"]', "must be one line of printable text"),
        ('setup = ["a\\nb"]', "must be one line of printable text"),
        ('setup = ["a\\u2028b"]', "must be one line of printable text"),
        ("nodes = 2", "unknown key `nodes`"),  # only what trains can use more than one
        ("[cluster]\nprocesses = 2", "unknown key `cluster.processes`"),
        ("[train-sed]\ngpus = 1", "unknown key `train-sed`"),
        ("shards = 0", "`shards`"),
    ],
)
def test_what_slurm_would_misread_is_one_line(text, told):
    with pytest.raises(UsageFailure, match=r"cpipe\.toml \[slurm\]: ") as failed:
        parsed(text)
    assert told in str(failed.value) and "\n" not in str(failed.value)


def test_every_key_has_a_sentence():
    def check(model):
        for name, field in model.model_fields.items():
            assert field.description and field.description[-1] in ".…", name
            if isinstance(field.annotation, type) and issubclass(field.annotation, Config):
                check(field.annotation)

    check(SlurmConfig)


def test_the_record_comes_back_as_it_was_written():
    text = JobsRecord(schema_id="cpipe.slurm/1").model_dump_json(by_alias=True)
    assert JobsRecord.from_json(text).jobs == ()
