"""One command from a folder of images to a report: `unianom inspect`."""
