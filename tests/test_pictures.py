"""files/pictures.py: what is drawn in a picture of batches, and a curve of what a history holds."""

from files import pictures


def test_cells_of_rows_are_recipes_by_turns_and_then_padding():
    packed = ([2, 1, 2], 6)  # 5 of 6 tokens are used
    padded = ([3], 4)
    assert pictures.cells_of([packed, padded]).tolist() == [
        [1, 1, 2, 1, 1, 3],
        [1, 1, 1, 3, 0, 0],
    ]


def test_a_row_never_shows_more_than_its_width():
    """The last token of a packed recipe is a target only: three recipes may have one token more than the row."""
    assert pictures.cells_of([([2, 2, 1], 4)]).tolist() == [[1, 1, 2, 2]]


def test_a_curve_is_drawn_of_the_lines_that_have_a_value(tmp_path):
    history = [
        {"step": 0, "val_loss": 3.0},
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": 2.0, "val_loss": None},
    ]
    pictures.curve(tmp_path / "curve.png", history)
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert [file.name for file in tmp_path.iterdir()] == ["curve.png"]
