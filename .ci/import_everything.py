"""Import every module of the three packages, as installed; fails on the first that does not import."""

import importlib
import pkgutil
import sys

count = 0
for package in ("attnlab_kernels", "attnlab", "attnlab_analyses"):
    root = importlib.import_module(package)
    if "site-packages" not in (root.__file__ or ""):
        sys.exit(f"{package} came from {root.__file__}, not from the installed wheel")
    for module in pkgutil.walk_packages(root.__path__, prefix=f"{package}."):
        importlib.import_module(module.name)
        count += 1
print(f"{count} modules import from the wheel")
