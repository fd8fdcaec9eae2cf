"""From images to samples."""
