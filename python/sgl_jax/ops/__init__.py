"""Operations below the models: each with an api, a reference, and implementations per platform."""
