"""fastseg: train a segmentation UNet on folders of photos and masks.

    result = fastseg.train({"num_epochs": 5})      # reads data/train_images, data/train_masks, ...

`__init__.pyi` lists the public names. Each is imported on first use, so that `import fastseg` loads neither torch nor
DALI nor numba.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
