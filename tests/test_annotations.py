"""The import hook of conftest.py is at work."""

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from advtransfer.analysis.matches import most_helpful
from advtransfer.optim import sgd
from advtransfer.report.sections import format_eps


@pytest.mark.parametrize(
    "call",
    [
        lambda: format_eps(b"l2", 0.5),
        lambda: sgd(0.1, nesterov="no"),
        lambda: most_helpful(np.ones((2, 3), complex), 1),  # orders complex numbers
    ],
)
def test_a_call_that_no_annotation_allows_fails(call):
    with pytest.raises(TypeCheckError):
        call()


def test_a_functions_own_refusal_comes_first():
    with pytest.raises(ValueError, match="pass .Q, N."):
        most_helpful(np.ones(3), 1)
