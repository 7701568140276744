from vaopd.config import WorldConfig
from vaopd.data.sources import read_examples
from vaopd.data.validate import check_disjoint
from vaopd.world.data import write_world


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
