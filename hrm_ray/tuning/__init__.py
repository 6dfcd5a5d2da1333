"""Sweeps: many runs of one configuration, of which Optuna chooses the values and Ray Tune runs the trials.

The Optuna study in the sweep's folder is the only state of a sweep, the folder of a trial (an ordinary run) the only
state of its training. So nothing has to be restored: the same command opens the study and goes on.
"""
