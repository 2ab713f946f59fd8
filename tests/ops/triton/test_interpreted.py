"""The tests of all backends again, for Triton's kernels under its interpreter."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.ops import test_ops, test_sampling
from tests.ops.test_ops import (  # noqa: F401
    test_add_rounds_once,
    test_argmax_finds_the_largest,
    test_attention_over_a_poisoned_cache,
    test_finite_finds_every_bad_value,
    test_non_finite_values_survive_the_cache,
    test_rms_norm,
    test_rope_rotates_each_pair_by_its_angle,
    test_rotary_angles_are_positions_times_frequencies,
    test_route_gives_valid_experts_for_nan,
    test_route_takes_the_largest_logits,
    test_swiglu,
)
from tests.ops.test_sampling import (  # noqa: F401
    on_cpu,
    test_draw_inverts_the_cumulative_distribution,
    test_each_truncation_equals_transformers,
    test_equal_logits_are_kept_together,
    test_every_row_has_its_own_settings,
    test_tokens_without_mass_are_never_drawn,
)

# numpy warns of the infinities and NaN that the tests contain, and of how the interpreter reads the bounds of a loop.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
