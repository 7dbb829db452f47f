"""Operations on identities: merge, mix, compare, save and load."""
