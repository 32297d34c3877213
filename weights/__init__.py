"""Official weights: from a folder, a single file or a hub id to the modules of minidit, and back.

files.py        headers and rows of .safetensors and .pth files, JSON; nothing is trusted
keymap.py       how a key map is read in both directions
sd3.py flux.py lumina.py lumina2.py
                a family each: its transformer's key map and sizes, and what it consists of
common.py       the same for the networks that families share: VAE, CLIP, T5, Gemma
tokenizers.py   the files of tokenizers
networks.py     the tables of networks and families, and a network in files before it is loaded
resolve.py      where a model is: local, packaged or on the hub
load.py         what is there, in any published layout, and loading it
interrupt.py    Ctrl-C while torch is imported
save.py         a model written as a folder in the diffusers layout

A new family is a file such as sd3.py and its names in two tables of networks.py.
On the command line: python -m weights inspect PATH, python -m weights convert PATH FOLDER.
"""
