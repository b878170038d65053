"""The embedded demo model's world: captions, images, and a checker that tells whether they agree."""
