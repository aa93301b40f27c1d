"""Training of image classifiers: `python -m examples.imagenet --help`, or `torchrun ... -m examples.imagenet`.

data.py has the images, dali.py their decoding by NVIDIA DALI, ranks.py what processes say to each other,
checkpoint.py the files, train.py the recipe and the loop, and __main__.py the options and their checks.
"""
