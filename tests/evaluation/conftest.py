import pytest
from report_toys import toy_tree


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """Folders of six stacks on four benchmarks, 28 samples each; not to be written to."""
    return toy_tree(tmp_path_factory.mktemp("tree"), 28)
