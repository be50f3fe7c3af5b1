"""Trajectory matching (MTT, FTD, TESLA, PP, DATM, ATT): unroll a student, match an expert.

May import what methods may.
"""
