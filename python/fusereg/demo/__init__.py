"""`fusereg demo`: trains a small network with each technique, by fusereg and by plain PyTorch.

data.py reads the images, techniques.py holds a row per technique (add yours there), train.py trains
a pair of networks side by side, report.py makes the table and the JSON, plots.py, filters.py and
contact_sheet.py the pictures, run.py ties them up.
"""
