"""The main job: small models trained on real text, and what each family of operators saves them.

``python -m torch_winnow.demo`` (or ``make demo``) trains, measures, prints one table and saves one
figure. Needs the extra ``demo``: tqdm, matplotlib and tabulate.
"""
