"""Official weights: from a folder, a single file or a hub id to the modules of minidit.

files.py    headers and rows of .safetensors and .pth files
keymap.py   the mechanism of the key maps, and strict checking
sd3.py lumina.py   the key maps themselves, one table per network and published layout
load.py     parts of a model, loaded strictly, without a second copy in memory
"""
