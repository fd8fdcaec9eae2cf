"""How trials end."""

DONE, STOPPED, FAILED, CRASHED = "done", "stopped", "failed", "crashed"
"""How a trial ended: to its end; early, being worse than others; by a fault of its own values; by one of the machines
it ran on, so that it is tried again when the campaign is resumed."""

STATUSES = (DONE, STOPPED, FAILED, CRASHED)

CARRIED = "carried"
"""How a part of a trial of population-based training ended that others go on from."""
