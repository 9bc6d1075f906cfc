"""Nothing in here is the method: files, labels, scores, pictures, checkpoints, the command line.

Imports nothing of ours from outside this folder.
"""
