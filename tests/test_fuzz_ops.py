"""Every operator, called with what nobody should pass: it answers, or says which argument is wrong.

Each example starts from arguments that fit together (``fuzz/<family>.py``) and spoils some of them
(``fuzz/spoiling.py``): dtypes, ranks, sizes, strides, devices, options, and contents such as block
tables and ancestors that point anywhere. Allowed are a result, which may not depend on strides and
has the shapes that the fake kernel says, and an error that names an argument. Under
AddressSanitizer (see CONTRIBUTING.md) a read or write outside of any argument ends the run too.

``WINNOW_FUZZ_EXAMPLES=5000`` looks longer; ``make fuzz`` lets coverage lead the search.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fuzz.operators import ARGUMENTS, SCHEMAS, try_operator

EXAMPLES = settings(
    max_examples=int(os.environ.get("WINNOW_FUZZ_EXAMPLES", "30")),
    database=None,
    deadline=None,
    phases=[Phase.generate],  # looking for a smaller example takes minutes
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_or_an_error_that_names_an_argument(name: str):
    @EXAMPLES
    @given(st.data())
    def run(data: st.DataObject) -> None:
        try_operator(name, lambda count: data.draw(st.integers(0, count - 1)))

    run()


def test_every_operator_is_called():
    assert ARGUMENTS.keys() == SCHEMAS.keys()
