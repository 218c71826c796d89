"""`fusereg demo`: train a small network with each technique, with fusereg and in plain PyTorch.

data.py reads the images, techniques.py has a row for each technique (add yours there), train.py
trains a pair of networks side by side, report.py makes the table and the JSON, plots.py and
mosaics.py the pictures, run.py ties them together.
"""
