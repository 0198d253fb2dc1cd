"""What :mod:`torch_winnow.resampling` exports, one topic a module."""
