"""The world of the bundled demo model: captions, images, and a checker of whether an image shows its caption."""
