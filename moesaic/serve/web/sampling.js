/** The settings of an answer: their names in the API, ranges and defaults. */

/**
 * @typedef {{name: string, label: string, hint: string, min: number, max: number, step: number, standard: number | null}}
 *   Setting `standard` is the default; null: nothing is sent
 * @typedef {Record<string, number>} Settings what differs from the defaults
 */

const LARGEST_SEED = 2 ** 32 - 1;

/** @type {readonly Setting[]} */
export const SETTINGS = Object.freeze([
  {
    name: "temperature",
    label: "Temperature",
    hint: "Low is steady, high is inventive; 0 always takes the likeliest token.",
    min: 0,
    max: 2,
    step: 0.05,
    standard: 0.7,
  },
  {
    name: "max_tokens",
    label: "Max new tokens",
    hint: "Where an answer is cut at the latest.",
    min: 1,
    max: 8192,
    step: 1,
    standard: 1024,
  },
  {
    name: "top_p",
    label: "Top-p",
    hint: "Only the likeliest tokens that together have this much probability; 1 is off.",
    min: 0.01,
    max: 1,
    step: 0.01,
    standard: 0.95,
  },
  {
    name: "top_k",
    label: "Top-k",
    hint: "Only this many of the likeliest tokens; 0 is off.",
    min: 0,
    max: 200,
    step: 1,
    standard: 0,
  },
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    hint: "Above 1, tokens that were there before become less likely.",
    min: 0.5,
    max: 2,
    step: 0.01,
    standard: 1,
  },
  {
    name: "seed",
    label: "Seed",
    hint: "The same seed gives the same answer again; empty is a new one each time.",
    min: 0,
    max: LARGEST_SEED,
    step: 1,
    standard: null,
  },
]);

const BY_NAME = new Map(SETTINGS.map((setting) => [setting.name, setting]));

/**
 * Returns the value in the setting's range, or null if it is not a number at all.
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
 * Returns the known settings among `values`, each in its range; the rest is dropped.
 * @param {Record<string, unknown>} values
 * @returns {Settings}
 */
export function known(values) {
  /** @type {Settings} */
  const found = {};
  for (const setting of SETTINGS) {
    const value = clamp(setting.name, Object.hasOwn(values, setting.name) ? values[setting.name] : null);
    if (value !== null && value !== setting.standard) found[setting.name] = value;
  }
  return found;
}

/**
 * Returns the fields of a request: the settings, and the defaults of those that were not changed.
 * @param {Settings} settings
 * @returns {Record<string, number>}
 */
export function fields(settings) {
  const standard = SETTINGS.flatMap(({ name, standard }) => (standard === null ? [] : [[name, standard]]));
  return { ...Object.fromEntries(standard), ...settings };
}
