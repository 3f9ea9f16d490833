"""Mix'n'match: which nested width each block takes, so that all of them together cost what is asked.

Devvrit et al. 2024, "MatFormer: Nested Transformer for Elastic Inference", arXiv 2310.07707, section 3: any width in any block needs no further training, and
of all mixes of equal cost those that never narrow and change least from block to block do best. Those have two neighbouring widths, the wider one last.
Cost of an FFN is proportional to its width, so a budget of units is a budget of multiply-adds. Not as they are for a network that was not nested in
training: in a small one with units only sorted, the same widths reversed did far better, so try both.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from apportion.errors import PlanError


def mixes(choices: Sequence[int], depth: int) -> tuple[tuple[int, ...], ...]:
    """All widths that never narrow and take two neighbouring choices, cheapest first: from all blocks at the smallest to all at the largest.

    `choices` ascend, as `space.width` does; (len(choices) - 1) * depth + 1 mixes of `depth` entries each.
    """
    return (
        (choices[0],) * depth,
        *((small,) * (depth - wide) + (large,) * wide for small, large in itertools.pairwise(choices) for wide in range(1, depth + 1)),
    )


def mix(choices: Sequence[int], depth: int, units: int) -> tuple[int, ...]:
    """The largest of the mixes whose widths add up to `units` at most. Raises PlanError where not even the smallest does."""
    affordable = [widths for widths in mixes(choices, depth) if sum(widths) <= units]
    if not affordable:
        raise PlanError(f"{units} hidden units for {depth} blocks", wanted=f"at least {depth * choices[0]}", do="Allow more, or leave out blocks as well.")
    return affordable[-1]
