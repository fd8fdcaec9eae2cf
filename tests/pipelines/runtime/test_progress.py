import os
import pty
import subprocess
import sys

import pytest

from pipelines.runtime import progress as module
from pipelines.runtime.progress import Progress


def test_a_line_per_interval_and_a_last_one_in_logs(capsys, monkeypatch):
    progress = Progress("ingest", 10)
    progress.advance(2)
    progress.advance(3)  # within the interval
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0)
    progress.set(8, "loss 0.5")
    line = capsys.readouterr().err
    assert line.startswith("ingest: 8/10 images, ")
    assert "/s, 0 s left; loss 0.5" in line
    progress.note("careful")
    assert progress.close() > 0
    note, last = capsys.readouterr().err.splitlines()
    assert note == "ingest: careful"
    assert last.startswith("ingest: 8/10 images, ")
    assert last.endswith("/s, 0 s; loss 0.5")


def test_nothing_to_do(capsys):
    assert Progress("embed", 0, "patches").close() == 0
    assert capsys.readouterr().err == "embed: 0/0 patches, 0.0/s, 0 s\n"


SCRIPT = """
import time
from pipelines.runtime.progress import Progress
outer, inner = Progress("tune", 2, "trials"), Progress("encode", 4)
for _ in range(4):
    inner.advance(1)
    time.sleep(0.15)
inner.close()
{end}
"""


@pytest.mark.parametrize("end", ["outer.advance(2); outer.close()", "raise SystemExit('broken')"])
def test_a_live_bar_on_a_terminal_that_is_left_as_it_was(end):
    """Also by a job that fails while bars are shown."""
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", SCRIPT.format(end=end)], stderr=theirs, stdout=theirs) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # closed at the other end
                break
    os.close(ours)
    assert process.wait() in (0, 1)
    text = shown.decode()
    assert "encode: 2/4 images" in text
    assert "tune: 0/2 trials" in text
    assert "\x1b[?25l" in text, "the cursor is hidden while a bar is drawn"
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "encode: 4/4 images, " in text
    assert ("tune: 2/2 trials, " in text) == ("outer" in end)
