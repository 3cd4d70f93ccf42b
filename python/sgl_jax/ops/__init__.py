"""Operations below the models. Attention and grouped matmul each have an API, a reference and implementations per platform;
norm and rotation are plain JAX."""
