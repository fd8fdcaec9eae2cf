"""How somebody's own folder is laid out, found out by names: `detect_layout`.

    listing ─▶ published layouts: Layout.recognise ─▶ tree of folders ─▶ roles by usual names, tables ─▶ layout, options

Nothing is guessed silently: every decision is said in words, and what names leave open is an error with the commands
that say it.
"""

from unianom.data.layout_detection.commands import command_line, option_arguments
from unianom.data.layout_detection.detect import ROLES, Detected, detect_layout

__all__ = ["ROLES", "Detected", "command_line", "detect_layout", "option_arguments"]
