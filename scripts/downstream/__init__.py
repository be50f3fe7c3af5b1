"""What a distilled set is good for beside accuracy: small experiments with published protocols."""
