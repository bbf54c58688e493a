import pytest

from bridge import progress


@pytest.mark.parametrize("show", [False, True])
def test_a_bar_changes_nothing_about_the_work(show, monkeypatch, capfd):
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.0)
    assert list(progress.bar(iter(range(3)), description="counting", show=show, total=3)) == [0, 1, 2]
    shown = capfd.readouterr()
    assert shown.out == ""
    assert ("counting" in shown.err) is show


def test_short_work_shows_nothing(capfd):
    assert list(progress.bar(range(3), description="counting", show=True)) == [0, 1, 2]
    assert "counting" not in capfd.readouterr().err
