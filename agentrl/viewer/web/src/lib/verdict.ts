/** What may be said of an explanation as a whole: nothing is called right that was not checked. */
import type { Explained } from './types'

export function verdict(told: Pick<Explained, 'adds_up' | 'unchecked'>): ['good' | 'bad' | 'dim', string] {
  if (told.adds_up === true) return ['good', '✓ Made again from the record, the advantage is the recorded one.']
  if (told.adds_up === false) return ['bad', 'The lines do not add up to what was recorded: the record or its configuration was changed, or own code had a part in it.']
  return ['dim', `As recorded, not checked: ${told.unchecked ?? 'nothing says why'}.`]
}
