"""Every public function, called with what nobody should pass, as in ``test_fuzz_ops.py``.

Here arguments may also be no tensors, numbers or lists at all. What is refused has changed nothing.
"""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.functions import FUNCTIONS, try_function
from test_fuzz_ops import EXAMPLES
from torch_winnow import attention, kvcache, resampling, unmasking


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_answer_or_an_error_that_names_an_argument(name: str):
    @EXAMPLES
    @given(st.data())
    def run(data: st.DataObject) -> None:
        try_function(name, lambda count: data.draw(st.integers(0, count - 1)))

    run()


def test_every_function_is_called():
    public = {
        name
        for family in (attention, resampling, unmasking, kvcache)
        for name in family.__all__
        if inspect.isfunction(getattr(family, name))
    }
    assert public <= FUNCTIONS.keys()
