import pytest

from lissa import tree
from lissa.testing import LawBroken, make_samples, sampling_solvers


@pytest.mark.parametrize("law", [sampling_solvers.exactness, sampling_solvers.inverse_of_the_mean])
def test_a_singular_curvature_does_not_keep_the_cause_from_being_sought(law):
    """Equal rows in two dimensions: without damping there is no inverse to compare with."""
    samples = make_samples(dimension=2, batches=2, equal=True, seed=1)
    assert samples.data.any()
    with pytest.raises(LawBroken, match="a wrong final scale"):
        law(lambda matvec, v, data, **_: tree.scale(3.0, tree.unflatten(samples.solution(), v)), samples)


def test_a_solver_that_takes_no_product_is_told_so():
    with pytest.raises(LawBroken, match="no product was taken"):
        sampling_solvers.batch_size(lambda matvec, v, data, **_: v, make_samples(seed=1))
