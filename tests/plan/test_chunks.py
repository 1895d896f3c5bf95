"""Shapes of steps: the smallest that holds a step, and no other."""

from __future__ import annotations

import pytest

from zincmetal.plan.choices import OUTPUTS, WITHOUT_LOGITS
from zincmetal.plan.chunks import (
    CHUNK_ROWS,
    DECODE_ROWS,
    LOGITS_ROWS,
    MAX_SINGLES,
    ONE_ROW,
    OUTS,
    ROWS,
    USUAL_ROWS,
    VERIFY_ROWS,
    StepShape,
    chunk_shape,
    decode_shape,
    full_rows,
    prompt_shapes,
    rows_for,
    verify_shape,
)


def test_classes_of_rows_are_those_of_both_kinds_of_steps():
    assert ROWS == (1, 2, 4, 8, 16, 32, 128, 512, 2048)
    assert set(ROWS) == {*DECODE_ROWS, *CHUNK_ROWS}


@pytest.mark.parametrize("n", range(1, MAX_SINGLES + 1))
def test_a_decode_step_has_the_next_class(n):
    for output in OUTPUTS:
        shape = decode_shape(n, output)
        assert shape.only_singles
        without = output in WITHOUT_LOGITS
        assert shape.outputs_in_order == (not without)
        assert shape.rows in DECODE_ROWS
        assert n <= shape.rows < 2 * n
        assert shape.outs == (0 if without else shape.rows)


def test_a_chunk_has_the_smallest_shape_that_holds_it():
    for rows in (2, 3, 32, 33, 34, 128, 130, 512, 2000):
        for singles in (n for n in (0, 1, 5, 30, 31, 32) if n <= rows - 2):
            for outs in (n for n in (0, 1, 2, 32, 33, 64) if n <= rows):
                for output in ("argmax", "all"):
                    shape = chunk_shape(rows, singles, outs, output)
                    assert shape.rows >= rows
                    assert shape.singles >= singles
                    assert shape.outs >= outs
                    assert not shape.only_singles
                    assert (shape.singles == 0) == (singles == 0)
                    assert (shape.output == "none") == (outs == 0)
                    smaller = [r for r in (32, 128, 512) if r < shape.rows]
                    assert all(r < rows or min(MAX_SINGLES, r - 2) < singles for r in smaller) or shape.rows == 64
                    assert shape.outs in OUTS or shape.outputs_in_order


@pytest.mark.parametrize("n", range(2, VERIFY_ROWS[-1] + 1))
def test_a_step_with_drafts_has_the_kernels_of_decode_steps(n):
    shape = verify_shape(n, "draw")
    assert shape.rows in VERIFY_ROWS
    assert n <= shape.rows < 2 * n
    assert (shape.outs, shape.only_singles, shape.outputs_in_order) == (shape.rows, False, False)
    assert shape.decodes
    assert not chunk_shape(shape.rows, 0, 0, "none").decodes


def test_one_row_is_always_the_shape_of_one_row():
    assert chunk_shape(1, 1, 1, "argmax") == decode_shape(1) == ONE_ROW
    assert chunk_shape(1, 1, 0, "argmax") == StepShape(1, 1, 0, "none")
    assert chunk_shape(1, 0, 1, "all") == StepShape(1, 1, 1, "all")


def test_logits_of_all_rows_need_no_rows_taken_out():
    for n in range(2, LOGITS_ROWS + 1):
        shape = chunk_shape(n, 0, n, "all")
        assert shape.outputs_in_order
        assert shape.rows == shape.outs == (32 if n <= 32 else 64)
    assert not chunk_shape(40, 3, 40, "all").outputs_in_order
    assert not chunk_shape(32, 0, 32, "argmax").outputs_in_order


def test_single_rows_that_are_not_all_outputs_are_a_chunk():
    assert chunk_shape(3, 3, 2, "argmax") == StepShape(32, 30, 32, "argmax")
    assert chunk_shape(32, 32, 3, "draw") == StepShape(128, 32, 32, "draw")


@pytest.mark.parametrize(
    "shape",
    [(0, 0, 0, "none"), (4, 3, 1, "argmax"), (4, 5, 1, "argmax"), (4, -1, 1, "argmax"), (4, 0, 5, "argmax"),
     (4, 4, 2, "argmax"), (4, 0, 0, "argmax"), (4, 0, 1, "none"), (4, 0, 1, "best"), (128, 0, 65, "all")],
)  # fmt: skip
def test_sizes_that_contradict_each_other(shape):
    with pytest.raises(ValueError, match="no step has"):
        StepShape(*shape)


def test_a_step_that_no_shape_holds():
    for call in (
        lambda: decode_shape(33),
        lambda: decode_shape(-1),
        lambda: chunk_shape(2049, 0, 1, "argmax"),
        lambda: chunk_shape(500, 33, 1, "argmax"),
        lambda: chunk_shape(500, 0, 65, "argmax"),
    ):
        with pytest.raises(ValueError, match="no shape has"):
            call()


@pytest.mark.parametrize("n", [0, 1, 2, 3, 32, 33, 34, 129, 130, 513, 514, 515, 1300])
def test_a_prompt_is_cut_into_chunks_and_its_last_token(n):
    shapes = prompt_shapes(n)
    assert shapes[-1:] == [ONE_ROW] * (n > 0)
    assert all(shape.output == "none" for shape in shapes[:-1])
    taken = sum(shape.rows for shape in shapes)
    assert taken >= n
    assert all(shape.rows == USUAL_ROWS for shape in shapes[:-2])
    if n > 1:
        assert shapes[-2].rows <= rows_for(n)


def test_full_rows():
    assert [full_rows(n) for n in (1, 31, 32, 127, 512, 513, 2048, 10**6)] == [1, 31, 32, 32, 512, 512, 2048, 2048]


def test_rows_that_a_prompt_needs():
    wanted = (1, 2, 32, 33, 128, 129, 512, 513, 10**6)
    assert [rows_for(n) for n in wanted] == [1, 32, 32, 128, 128, *[512] * 4]


def test_a_shape_in_words():
    assert str(ONE_ROW) == "1 row, argmax"
    assert str(decode_shape(8, "draw")) == "8 single rows, draw"
    assert str(chunk_shape(100, 3, 4, "argmax")) == "128 rows (32 single), argmax of 32"
    assert str(chunk_shape(100, 0, 0, "none")) == "128 rows, none"
