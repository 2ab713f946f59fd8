"""Random truncations, which take the interpreter minutes."""

from __future__ import annotations

import pytest

from tests.ops.test_sampling import (  # noqa: F401
    on_cpu,
    test_kernels_keep_what_the_reference_keeps,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("these_kernels"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
