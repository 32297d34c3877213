"""Official weights: from a folder, a single file or a hub id to the modules of minidit.

resolve.py    where it is: local, packaged or on the hub
model.py      what is there: the parts of a model in any published layout, by names and headers
load.py       the parts loaded: strictly, and without a second copy in memory
convert.py    any layout written as a folder in the diffusers layout
sd3.py lumina.py   the key maps, one table per network and layout, and sizes read from shapes
keymap.py     how a key map is read in both directions, and checked
networks.py   the networks there are, and their configs
files.py      headers and rows of .safetensors and .pth files

On the command line: python -m weights inspect PATH, python -m weights convert PATH FOLDER.
"""
