"""Frameworks that train from a file of their own: one thin file each, importable without the framework.

A file here turns what the framework's configuration says of the cache into `CachedKL`'s arguments, puts that mixin
before the framework's own trainer, and refuses by name the options of the framework that would make the loss another
one. What a configuration may say is `block`'s. How a loss is made, a cache filled or a batch looked up is `training`'s;
no file here may know.
"""
