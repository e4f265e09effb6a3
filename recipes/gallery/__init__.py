"""The README's pictures: ``python -m recipes.gallery`` runs recipes and photographs them in TensorBoard."""
