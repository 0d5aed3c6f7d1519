"""Exact solutions of rows of losses: weights, multipliers and a certificate.

How a divergence's risks are solved is declared in `algorithms`; `solution` takes rows from any size of losses to a
certified answer. Nothing here is recorded by autograd: derivatives come from the optimality conditions
(``drrho/optimum.py``).
"""
