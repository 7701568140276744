import pyarrow.parquet as pq

from vaopd.config import WorldConfig
from vaopd.data.sources import read_examples
from vaopd.data.validate import check_disjoint
from vaopd.world.data import export_world, write_world


def test_sets_have_their_sizes_are_disjoint_and_a_larger_training_set_leaves_the_test_set(tmp_path):
    small = write_world(WorldConfig(train=20, eval=5, test=6, seed=1), tmp_path / "a")
    large = write_world(WorldConfig(train=30, eval=5, test=6, seed=1), tmp_path / "b")
    sizes = [len(read_examples(path)) for path in (small.train, small.eval, small.test, large.train)]
    assert sizes == [20, 5, 6, 30]
    assert small.test.read_text() == large.test.read_text()
    check_disjoint(read_examples(large.train), {"test": read_examples(large.test), "eval": read_examples(large.eval)})
    other = write_world(WorldConfig(train=20, eval=5, test=6, seed=2), tmp_path / "c")
    assert other.test.read_text() != small.test.read_text()


def test_rows_have_everything_that_training_and_grading_read(tmp_path):
    written = write_world(WorldConfig(train=3, eval=1, test=2, seed=1), tmp_path)
    for example in read_examples(written.train):
        assert example.answer
        assert example.answer in example.solution
        assert len(example.images) == 1


def test_export_has_the_columns_of_geometry3k_and_reads_back_as_the_same_questions(tmp_path):
    world = WorldConfig(train=4, eval=2, test=3, seed=1, labels=4)
    written = write_world(world, tmp_path / "jsonl")
    exported = export_world(world, tmp_path / "parquet")
    assert [path.name for path in exported] == ["train.parquet", "eval.parquet", "test.parquet"]
    table = pq.read_table(exported[0])
    assert table.column_names == ["images", "problem", "answer", "solution"]
    assert table["problem"][0].as_py().startswith("<image>")
    assert table["images"][0].as_py()[0]["bytes"].startswith(b"\x89PNG")
    for ours, theirs in zip(read_examples(written.train), read_examples(exported[0]), strict=True):
        assert f"<image>{ours.problem}" == theirs.problem
        assert (ours.answer, ours.solution) == (theirs.answer, theirs.solution)
