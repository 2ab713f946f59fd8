/** The sampling settings: API names, ranges and defaults. */

/**
 * @typedef {{name: string, label: string, hint: string, min: number, max: number, step: number, standard: number | null}}
 *   Setting `standard` is the default; null: the field is not sent
 * @typedef {Record<string, number>} Settings values that differ from the defaults
 */

const MAX_SEED = 2 ** 32 - 1;

/** @type {readonly Setting[]} */
export const SETTINGS = Object.freeze([
  {
    name: "temperature",
    label: "Temperature",
    hint: "Low values give predictable text, high values varied text; 0 always takes the most likely token.",
    min: 0,
    max: 2,
    step: 0.05,
    standard: 0.7,
  },
  {
    name: "max_tokens",
    label: "Max new tokens",
    hint: "Maximum length of an answer.",
    min: 1,
    max: 8192,
    step: 1,
    standard: 1024,
  },
  {
    name: "top_p",
    label: "Top-p",
    hint: "Samples from the most likely tokens with this total probability; 1 is off.",
    min: 0.01,
    max: 1,
    step: 0.01,
    standard: 0.95,
  },
  {
    name: "top_k",
    label: "Top-k",
    hint: "Samples from this number of most likely tokens; 0 is off.",
    min: 0,
    max: 200,
    step: 1,
    standard: 0,
  },
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    hint: "Values above 1 make repeated tokens less likely.",
    min: 0.5,
    max: 2,
    step: 0.01,
    standard: 1,
  },
  {
    name: "seed",
    label: "Seed",
    hint: "The same seed repeats an answer; empty gives a new answer each time.",
    min: 0,
    max: MAX_SEED,
    step: 1,
    standard: null,
  },
]);

const BY_NAME = new Map(SETTINGS.map((setting) => [setting.name, setting]));

/**
 * Returns the value, limited to the setting's range; null if it is not a number.
 * @param {string} name
 * @param {unknown} value
 * @returns {number | null}
 */
export function clamp(name, value) {
  const setting = BY_NAME.get(name);
  if (!setting || typeof value !== "number" || !Number.isFinite(value)) return null;
  const bounded = Math.min(setting.max, Math.max(setting.min, value));
  return Number.isInteger(setting.step) ? Math.round(bounded) : bounded;
}

/**
 * Returns the valid settings in `values`, each limited to its range. Unknown fields and defaults are dropped.
 * @param {Record<string, unknown>} values
 * @returns {Settings}
 */
export function validSettings(values) {
  /** @type {Settings} */
  const settings = {};
  for (const setting of SETTINGS) {
    const value = clamp(setting.name, Object.hasOwn(values, setting.name) ? values[setting.name] : null);
    if (value !== null && value !== setting.standard) settings[setting.name] = value;
  }
  return settings;
}

/**
 * Returns the fields of a request: the settings, and the defaults of all others.
 * @param {Settings} settings
 * @returns {Record<string, number>}
 */
export function requestFields(settings) {
  const standard = SETTINGS.flatMap(({ name, standard }) => (standard === null ? [] : [[name, standard]]));
  return { ...Object.fromEntries(standard), ...settings };
}
