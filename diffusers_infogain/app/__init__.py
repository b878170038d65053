"""The page of `diffusers-infogain app`: what it computes, without gradio, and the page itself."""
