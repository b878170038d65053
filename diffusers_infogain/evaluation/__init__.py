"""What a sampler buys: exact test models, and measurements of decoded samples."""
