"""Settings of `cpipe cluster` that depend on each other."""

import pytest

from cpipe.settings import resolve
from schemas.cluster_documents import ClusterConfig
from schemas.failures import UsageFailure


def config(**given):
    return resolve(ClusterConfig, {}, given, "cpipe cluster")


def test_the_leaves_of_a_tree_are_the_clusters():
    assert (config(tree="4x4").clusters, config(tree="4x4").branches()) == (16, (4, 4))
    assert config(tree="2x3x5", clusters=30).clusters == 30
    assert (config().clusters, config().branches()) == (8, ())
    again = ClusterConfig.from_json(config(tree="4x4").model_dump_json())
    assert again == config(tree="4x4")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"tree": "4x4", "clusters": 12}, "--tree 4x4 makes 16 clusters, not 12"),
        ({"tree": "99x99"}, "`clusters`: input should be less than or equal to 4096, found 9801"),
        ({"tree": "4x"}, "`tree`: string should match pattern"),
        ({"tree": "4"}, "`tree`: string should match pattern"),
        ({"tree": "4x0"}, "`tree`: string should match pattern"),
        ({"tree": 44}, "`tree`: input should be a valid string, found 44"),
        (
            {"tree": "2x2", "method": "unbalanced"},
            "--tree is fitted with clusters of equal size, not with --method un",
        ),
        ({"tree": "2x2", "sweep": "2,4"}, "--sweep compares numbers of clusters without --tree"),
        ({"sweep": "2,,4"}, "`sweep`: string should match pattern"),
        ({"sweep": "2,9999"}, "--sweep 2,9999: at most 4096 clusters"),
        ({"method": "random", "overlap": 0.1}, "--overlap needs distances, and --method random goes by"),
        ({"method": "random", "vectors": "v.npy"}, "--vectors needs distances, and --method random goes by"),
        ({"method": "random", "sweep": "2"}, "--sweep needs distances, and --method random goes by"),
        ({"clusters": 1, "overlap": 0.1}, "--overlap needs a second cluster"),
        (
            {"potentials": True, "method": "random"},
            "--potentials keep clusters of equal size equal, and --method random",
        ),
        ({"potentials": True, "method": "unbalanced"}, "equal, and --method unbalanced makes none"),
        ({"overlap": 1.5}, "`overlap`: input should be less than or equal to 1, found 1.5"),
    ],
)
def test_what_cannot_be_is_one_line(given, expected):
    with pytest.raises(UsageFailure) as refused:
        config(**given)
    assert expected in str(refused.value) and "\n" not in str(refused.value)


def test_numbers_to_compare_are_ascending_and_each_once():
    assert config(sweep="16,4,8,4").counts() == (4, 8, 16)
    assert config().counts() == ()


def test_a_sweep_is_the_same_whatever_it_does_not_look_at():
    sweep = config(sweep="4,8").key_settings()
    assert config(sweep="4,8", clusters=5, overlap=0.2, temperature=1.0, materialise=True).key_settings() == sweep
    assert config(sweep="4,8", seed=1).key_settings() != sweep
    assert config(sweep="4,8", potentials=True).key_settings() != sweep
    assert config(clusters=5).key_settings() != config().key_settings()


def test_where_vectors_lie_and_the_number_of_threads_are_not_in_the_key():
    assert config(vectors="a.npy", workers=3).key_settings() == config().key_settings()
